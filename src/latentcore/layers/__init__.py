"""The parts of a decoder layer: they call ops and do no arithmetic of their own."""
