"""What do the data parts hold? Tars, their index, and the way from both to batches; no models."""
