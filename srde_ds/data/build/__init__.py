"""Turns documents into a clean, balanced and packed dataset."""
