"""The program `srde-ds`: one module a verb. Heavy libraries load when a verb runs, not before."""
