"""Which processes of a run are still there, what each is doing, and who tells the others when one is lost."""
