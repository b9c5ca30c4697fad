"""What trained experts are worth: loss, accuracy and expert usage by domain, against the base."""
