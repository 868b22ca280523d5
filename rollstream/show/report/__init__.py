"""The report of a run: read from its folder, shown as one HTML page and in the terminal."""

from rollstream.show.report.data import ReportData
from rollstream.show.report.gathering import build_report
from rollstream.show.report.page import render_html
from rollstream.show.report.terminal import render_terminal
from rollstream.show.report.writing import write_report

__all__ = ["ReportData", "build_report", "render_html", "render_terminal", "write_report"]
