"""The verbs of `srde-ds`: their flags, and what they call. Heavy libraries load when a verb runs, not before."""
