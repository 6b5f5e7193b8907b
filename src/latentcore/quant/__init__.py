"""Weight formats: what a checkpoint stores, how it is packed, and the truth that it stands for."""
