"""From documents to a clean, balanced and packed dataset."""
