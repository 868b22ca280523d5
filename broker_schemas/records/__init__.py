"""What crosses a process boundary, as values: records, packs, events, and the rules that judge them."""
