"""Evaluates trained experts: loss, accuracy and expert usage by domain, compared with the base."""
