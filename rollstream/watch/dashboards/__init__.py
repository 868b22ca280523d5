"""The Grafana dashboards as code: what is asked, and how it is laid out."""

from rollstream.watch.dashboards.files import generated_files, outdated_files, write_generated

__all__ = ["generated_files", "outdated_files", "write_generated"]
