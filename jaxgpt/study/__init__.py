"""Studies: many runs that start from one model, trained as one program and evaluated alike."""
