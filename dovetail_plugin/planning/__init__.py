"""What fits where, from configs alone, before anything is loaded; `apply` then puts a loaded pair there."""
