"""The program `srde-ds`, with one module per verb. Heavy libraries load only when a verb runs."""
