"""Every limit of the dataset doctor, with its source.

Measured with benchmarks/dataset_doctor.py on 84 emoji of 64 px (assets/) and 410 preview images of ComfyUI's templates,
300 to 350 px: photos, drawings and screens. "Clean" are the images as they are; the others were made from them.
"""

from __future__ import annotations

# Detail: contrast of the finest octave, relative to the stronger of the next two. Of natural images each octave has
# about the same contrast (Field 1987, J. Opt. Soc. Am. A 4). Clean: at least 0.185. Enlarged twice: 95 % below 0.16.
# Gaussian blur of 1 px: 90 % below 0.18; of 1.5 px: all below 0.103.
BLURRY = 0.17
FLAT_LEVELS = 0.5  # of 255: contrast of the octaves below which an image has nothing to judge

# Brightness, in levels of 255. The percentiles leave out a small light or a white background around a drawing.
# Clean: the 99th percentile is at least 86 (1st: at most 168), and their distance at least 60.
DARK_LEVEL = 64  # the 99th percentile is below it: nearly everything is black
BRIGHT_LEVEL = 200  # the 1st percentile is above it: nearly everything is white
FLAT_RANGE = 40  # distance of both percentiles: gray without contrast

ENLARGED = 1.0  # more than this factor
TINY = 2.0  # at least this factor: three of four pixels are made up

# Copies: bits of 63 that differ in the hash of the low frequencies (Zauner 2010, "Implementation and Benchmarking of
# Perceptual Image Hash Functions", DCT hash), and correlation of the images at 16 x 16 pixels. JPEG at quality 30, half
# the size, 15 % brighter, 20 % more contrast: at least 97 % are found; 3 % cropped on each side: 90 % of the previews.
# Clean: 0 of 1,918 pairs of emoji; 5 of 33,670 of previews, all of which are copies or crops of one image.
SAME_HASH_BITS = 10
SAME_CORRELATION = 0.85

# Marks: cosine between the gradients of two images in one place, the share of images that agree, and how far the mark
# has edges of all directions (ratio of the eigenvalues of its structure tensor): a border or an outline has not. Clean
# emoji: outlines that agree, up to 14 of 56, have at most 0.06; text of any opacity has at least 0.45.
SAME_GRADIENT = 0.5
MARK_SHARE = 0.12
MARK_IMAGES = 5  # at least
MARK_DIRECTIONS = 0.2
