"""The budgets of docs/DESIGN.md, measured."""
