"""Plans what fits where, from configs alone, before anything is loaded; `apply` puts a loaded pair there."""
