"""The version of octavo, as files and records name it."""

VERSION = "0.1.0"
