"""Version of the package, in a module without imports, so that building the package does not import it."""

__version__ = "0.1.0"
