"""The Grafana dashboards as code: what is asked, and how it is laid out."""

from rollstream.watch.dashboards.files import dashboard_files

__all__ = ["dashboard_files"]
