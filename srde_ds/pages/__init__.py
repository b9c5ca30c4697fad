"""Pages of HTML in one file that open offline: sections, tables, charts by plotly, items to browse."""
