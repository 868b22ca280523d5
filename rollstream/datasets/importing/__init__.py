"""Foreign data sets to rollstream's JSONL: readers of five layouts, conversion and writing."""

from rollstream.datasets.importing.importer import import_dataset
from rollstream.datasets.importing.report import ImportProblem, ImportSummary, describe_summary

__all__ = ["ImportProblem", "ImportSummary", "describe_summary", "import_dataset"]
