"""Plans where the parts of a pair go, from configs alone. `apply` moves a loaded pair accordingly."""
