"""Draft checkpoints of this and other projects: `read` detects and reads them, `load` prepares their loading."""
