/* The hot loop of row_search.c for one trellis: included once for each, with N_STATES and its polynomials H0 and H1.

   Moves halve a state and cross it (xor) with constants, so the origins of consecutive states are consecutive but for a
   crossing of lanes. Crossings are shuffles that the compiler must know: hence one loop for each trellis. */

#define HALF (N_STATES / 2)
#define FIRST ((H0 >> 1) - HALF) /* what the move from an odd state is crossed with */
#define SECOND (H1 >> 1)         /* and that on branch 1 */

/* CHUNK states are handled by one instruction; processors of narrower registers take several. */
#if N_STATES >= 128
#define CHUNK 64
#define CHUNK_LIST LIST_64
#define HALF_LIST LIST_32
#elif N_STATES == 64
#define CHUNK 32
#define CHUNK_LIST LIST_32
#define HALF_LIST LIST_16
#elif N_STATES == 32
#define CHUNK 16
#define CHUNK_LIST LIST_16
#define HALF_LIST LIST_8
#elif N_STATES == 16
#define CHUNK 8
#define CHUNK_LIST LIST_8
#define HALF_LIST LIST_4
#elif N_STATES == 8
#define CHUNK 4
#define CHUNK_LIST LIST_4
#define HALF_LIST LIST_2
#else
#define CHUNK 2
#define CHUNK_LIST LIST_2
#define HALF_LIST LIST_1
#endif

#define BITS_BYTES (CHUNK < 8 ? 1 : CHUNK / 8)
#define CROSSED(origin, by) __builtin_shufflevector(origin, origin, CHUNK_LIST(XOR_OF, 0, (by) & (CHUNK - 1)))

WIDE static void JOINED(walk_, N_STATES)(
    const int64_t *branch_metrics, int64_t n_steps, uint16_t *here, uint16_t *there, uint8_t *taken
) {
    typedef uint16_t Chunk __attribute__((vector_size(2 * CHUNK), aligned(2)));
    typedef uint16_t HalfChunk __attribute__((vector_size(CHUNK), aligned(2)));
    typedef bool ChunkBits __attribute__((ext_vector_type(CHUNK)));
    for (int64_t step = 0; step < n_steps; step++) {
        if (step % REST_EVERY == 0) {
            Chunk least = *(Chunk *)here;
            UNROLLED for (int at = CHUNK; at < N_STATES; at += CHUNK)
                least = __builtin_elementwise_min(least, *(Chunk *)(here + at));
            Chunk all = (Chunk){0} + __builtin_reduce_min(least);
            UNROLLED for (int at = 0; at < N_STATES; at += CHUNK)
                *(Chunk *)(here + at) = __builtin_elementwise_sub_sat(*(Chunk *)(here + at), all);
        }
        uint64_t four = (uint64_t)branch_metrics[step];
        Chunk metrics[4];
        UNROLLED for (int subset = 0; subset < 4; subset++)
            metrics[subset] = (Chunk){0} + (uint16_t)(four >> 16 * subset);
        UNROLLED for (int to = 0; to < N_STATES; to += CHUNK) {
            int is_odd = to >= HALF; /* whether these states are reached from odd ones */
            const uint16_t *origins = here + (is_odd ? HALF : 0);
            int t = is_odd ? (to - HALF) ^ (FIRST & ~(CHUNK - 1)) : to;
            Chunk a = *(const Chunk *)(origins + t);
            Chunk b = *(const Chunk *)(origins + (t ^ (SECOND & ~(CHUNK - 1))));
            a = is_odd ? CROSSED(a, FIRST) : a;
            b = is_odd ? CROSSED(b, FIRST ^ SECOND) : CROSSED(b, SECOND);
            a = __builtin_elementwise_add_sat(a, metrics[2 * is_odd]);
            b = __builtin_elementwise_add_sat(b, metrics[2 * is_odd + 1]);
            Chunk least = __builtin_elementwise_min(a, b);
            *(HalfChunk *)(there + to / 2) = __builtin_shufflevector(least, least, HALF_LIST(TWICE_PLUS, 0, 0));
            *(HalfChunk *)(there + HALF + to / 2) = __builtin_shufflevector(least, least, HALF_LIST(TWICE_PLUS, 0, 1));
            ChunkBits is_first = __builtin_convertvector(least == a, ChunkBits);
            memcpy(taken, &is_first, BITS_BYTES);
            taken += BITS_BYTES;
        }
        uint16_t *reached = there;
        there = here;
        here = reached;
    }
}

static const RowTrellis JOINED(trellis_, N_STATES) = {N_STATES, FIRST, SECOND, CHUNK, JOINED(walk_, N_STATES)};

#undef CROSSED
#undef BITS_BYTES
#undef HALF_LIST
#undef CHUNK_LIST
#undef CHUNK
#undef SECOND
#undef FIRST
#undef HALF
#undef H1
#undef H0
#undef N_STATES
