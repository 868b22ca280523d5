"""The operator's front door: command line, local stack, report, live view, inspection."""
