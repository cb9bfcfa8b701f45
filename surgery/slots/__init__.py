"""Slots: how generated weights get into members and out again, also where a member is used as an ordinary module."""
