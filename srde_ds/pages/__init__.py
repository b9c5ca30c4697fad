"""HTML pages in a single file that open offline: sections, tables, plotly charts, items to browse."""
