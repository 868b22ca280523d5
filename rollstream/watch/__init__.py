"""A run while it runs: exporter, broker snapshot, live table, dashboards."""
