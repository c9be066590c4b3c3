"""One verb, one page: each composes the packages below and reads as a table of contents."""
