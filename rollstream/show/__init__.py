"""A run as people look at it: report, inspection, drawings, worked examples."""
