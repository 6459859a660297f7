"""canary: synthetic chat clients that say within seconds when delivery fails, how, and where."""

__version__ = "0.1.0"
