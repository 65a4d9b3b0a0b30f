"""What makes records trustworthy over time: scrubbing and repair, quarantine, conflicts between hosts, receipts."""
