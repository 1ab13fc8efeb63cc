"""Run records in, coefficients and error tables out."""
