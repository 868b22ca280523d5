"""Foreign data sets to rollstream's JSONL: readers of VOC, COCO and labelme, conversion and writing."""

from rollstream.dataset_import.importer import import_dataset
from rollstream.dataset_import.report import ImportProblem, ImportSummary, describe_summary

__all__ = ["ImportProblem", "ImportSummary", "describe_summary", "import_dataset"]
