/* All functions that are compiled once per instruction set. */
#include "vector.h"
#include "linear.h"
#include "attention.h"
#include "elementwise.h"
#include "rounding.h"
#include "gram.h"
#include "latent.h"
#include "select.h"
#include "sample.h"

#if DOT
#define PAIRS_PAY NAME(pairs_pay)
#else
#define PAIRS_PAY NULL
#endif
static const Functions NAME(functions) = {
    STRING(SUFFIX), NAME(prepare), NAME(multiply), NAME(look_up), NAME(attend), NAME(rms_norm), NAME(silu_mul), NAME(argmax),
    NAME(sample), NAME(rotate), NAME(rope), NAME(round_columns), NAME(descend), NAME(scale_errors), NAME(round_keys), NAME(gram_codes), NAME(gram_products),
    NAME(combine), NAME(write_latent),
    NAME(write_index_keys), NAME(heads), NAME(latent_attend), NAME(latent_join), NAME(select_prepare), NAME(select_score), PAIRS_PAY};

#undef PAIRS_PAY
#undef GRAM_BYTES
#undef GRAM_MOST
#undef GRAM_EACH
#undef GRAM_STEPS
#undef GRAM_ROWS
#undef vf
#undef vi
#undef vu
#undef vh
#undef vb
#undef vp
#undef vs
#undef UNIT
#undef ONE_PANEL
#undef TWO_PANELS
#undef WIDEN_STEPS
#undef APART
#undef NIBBLES
#undef PARTS
#undef HALF_UNDO
#undef UNDO
#undef SHIFT
#undef MIXED
#undef INLINE
#undef SELECT
#undef SUFFIX
#undef VL
#undef ISA
#undef TILE_ROWS
#undef DOT
#undef TILES
