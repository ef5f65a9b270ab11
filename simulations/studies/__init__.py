"""Studies: questions to finished runs, each with the page that it writes."""
