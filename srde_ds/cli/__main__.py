"""`python -m srde_ds.cli`."""

from srde_ds.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
