"""Which experts tokens go to: records, their files, and what they say."""
