"""The joint model: members and one dictionary, what is known of them, and what they take."""
