"""Records of a run: its log, report, pictures and trackers."""
