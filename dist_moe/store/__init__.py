"""The packed store: its units and their placement, the writer, and the mapped reader."""
