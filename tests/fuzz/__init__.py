"""What reads words of others, fed with anything: only errors of ours come out, soon, and nothing outside is touched."""
