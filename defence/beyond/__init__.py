"""Additions to the report's repair: the hardening, the scan, the checks, the measurements."""
