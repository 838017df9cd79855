"""Screening over HTTP: photos in, decisions out. No torch; needs the extra `serve`."""
