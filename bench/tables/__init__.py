"""Tables, charts and result files drawn from measurements."""
