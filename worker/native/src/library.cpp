// Tells what the library was built from.

#ifndef SPANWISE_SOURCES
#error "setup.py defines SPANWISE_SOURCES: a digest of this folder"
#endif

extern "C" const char* spanwise_sources() { return SPANWISE_SOURCES; }
