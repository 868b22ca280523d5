"""The one door to the broker: connection, keys, scripts, and what each role may ask of them."""
