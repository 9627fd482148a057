/* The chain of nine beads in 200 solvent particles, in units of the model: sigma = m = epsilon = 1, kT = 1.3.
   Energy of systems/polymer_in_solvent; polymer_liquid.py compiles and checks it. Coordinates are [3][N], beads first. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define N 209
#define BEADS 9
#define ROOM 192
#define CUT2 6.25
#define SKIN 0.35
static const double KT = 1.3;

typedef struct { int count[N]; int near[N][ROOM]; double at[3][N]; double edge; } List;

static void list_pairs(const double *x, List *list) {
    const double edge = list->edge, reach = (2.5 + SKIN) * (2.5 + SKIN);
    static double d2[N];
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < N; j++) {
            double a = x[i] - x[j], b = x[N + i] - x[N + j], c = x[2 * N + i] - x[2 * N + j];
            a -= edge * rint(a / edge); b -= edge * rint(b / edge); c -= edge * rint(c / edge);
            d2[j] = a * a + b * b + c * c;
        }
        int m = 0;
        for (int j = i < BEADS ? BEADS : 0; j < N; j++)
            if (d2[j] < reach && j != i && m < ROOM) list->near[i][m++] = j;
        list->count[i] = m;
    }
    memcpy(list->at, x, sizeof(list->at));
}

static void refresh(const double *x, List *list) {
    double most = 0;
    const double *at = &list->at[0][0];
    for (int i = 0; i < N; i++) {
        double a = x[i] - at[i], b = x[N + i] - at[N + i], c = x[2 * N + i] - at[2 * N + i], d2 = a * a + b * b + c * c;
        most = d2 > most ? d2 : most;
    }
    if (most > 0.25 * SKIN * SKIN) list_pairs(x, list);
}

/* Energy at squared distance u, and -2 dE/du. */
static inline double pair(double u, double *pull) {
    double i1 = 1 / u, i3 = i1 * i1 * i1, e = 4 * (i3 * i3 - i3), de = 4 * i1 * (3 * i3 - 6 * i3 * i3);
    double near = u < 4 ? 4 : u; near = near > CUT2 ? CUT2 : near;
    double gap = CUT2 - near, s = gap * gap * (2 * near - 5.75) / 11.390625, ds = 2 * gap * (gap - 2 * near + 5.75) / 11.390625;
    *pull = -2 * (de * s + e * ds);
    return e * s;
}

/* Energy of all pairs with a solvent particle; f is written. */
static double liquid(const double *x, double *f, const List *list) {
    const double edge = list->edge, per = 1 / edge;
    double twice = 0;
    for (int i = 0; i < N; i++) {
        const int *near = list->near[i];
        const int m = list->count[i];
        const double xi = x[i], yi = x[N + i], zi = x[2 * N + i];
        double fa = 0, fb = 0, fc = 0, e = 0;
        for (int k = 0; k < m; k++) {
            const int j = near[k];
            double a = xi - x[j], b = yi - x[N + j], c = zi - x[2 * N + j], g;
            a -= edge * rint(a * per); b -= edge * rint(b * per); c -= edge * rint(c * per);
            e += pair(a * a + b * b + c * c, &g);
            fa += g * a; fb += g * b; fc += g * c;
        }
        f[i] = fa; f[N + i] = fb; f[2 * N + i] = fc;
        twice += e;
    }
    return 0.5 * twice;
}

/* Energy inside the chain, added to f. */
static double chain(const double *x, double *f) {
    double energy = 0;
    for (int i = 0; i < BEADS; i++)
        for (int j = i + 1; j < BEADS; j++) {
            double d[3], u = 0, g, e;
            for (int k = 0; k < 3; k++) { d[k] = x[k * N + i] - x[k * N + j]; u += d[k] * d[k]; }
            double r = sqrt(u);
            if (j - i >= 3) e = pair(u, &g);
            else { double rest = j - i == 1 ? 1.0 : 1.63; e = 250 * (r - rest) * (r - rest); g = -500 * (r - rest) / r; }
            if (j - i == BEADS - 1) {
                double q = (r - 4.62) / 0.8;
                e += 9.1 * (0.25 * q * q * q * q - q * q);
                g -= 9.1 * (q * q * q - 2 * q) / 0.8 / r;
            }
            energy += e;
            for (int k = 0; k < 3; k++) { f[k * N + i] += g * d[k]; f[k * N + j] -= g * d[k]; }
        }
    return energy;
}

static uint64_t state[2];
static double uniform(void) {
    uint64_t a = state[0], b = state[1];
    state[0] = b; a ^= a << 23; state[1] = a ^ b ^ (a >> 17) ^ (b >> 26);
    return ((state[1] + b) >> 11) * 0x1.0p-53 + 0x1.0p-54;
}

static void seeded(uint64_t seed) { state[0] = seed * 0x9E3779B97F4A7C15ull + 1; state[1] = seed ^ 0xD1B54A32D192ED03ull; for (int i = 0; i < 20; i++) uniform(); }

/* v <- kept v + sqrt((1 - kept^2) kT) noise of particles from first on; the kinetic energy gained. */
static double thermalise(double *v, int first, double kept) {
    const double size = sqrt((1 - kept * kept) * KT);
    double gained = 0;
    for (int k = 0; k < 3; k++)
        for (int i = first; i < N; i++) {
            double old = v[k * N + i];
            v[k * N + i] = kept * old + size * sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform());
            gained += 0.5 * (v[k * N + i] * v[k * N + i] - old * old);
        }
    return gained;
}

double potential(const double *x, double edge, double *f) {
    static List list; list.edge = edge;
    list_pairs(x, &list);
    double e = liquid(x, f, &list);
    return e + chain(x, f);
}

/* Velocity Verlet, velocities drawn anew every `redraw` steps; chains [n_steps / every][3][BEADS] on the way. */
void run(double *x, double *v, double edge, int n_steps, double dt, int redraw, int every, uint64_t seed, double *chains) {
    static List list; double f[3 * N]; list.edge = edge;
    seeded(seed);
    list_pairs(x, &list);
    liquid(x, f, &list); chain(x, f);
    for (int step = 1; step <= n_steps; step++) {
        for (int i = 0; i < 3 * N; i++) { v[i] += 0.5 * dt * f[i]; x[i] += dt * v[i]; }
        refresh(x, &list);
        liquid(x, f, &list); chain(x, f);
        for (int i = 0; i < 3 * N; i++) v[i] += 0.5 * dt * f[i];
        if (step % redraw == 0) thermalise(v, 0, 0.0);
        if (step % every == 0) for (int k = 0; k < 3; k++) for (int i = 0; i < BEADS; i++) *chains++ = x[k * N + i];
    }
}

/* Driven path in place: beads along the polyline ways [n_ways + 1][3][BEADS] at h[1..n_steps]; solvent O V R V O; the work. */
double drive(double *x, double *v, double edge, const double *ways, int n_ways, const double *h, int n_steps, double dt, double friction, uint64_t seed) {
    static List list; double f[3 * N], waste[3 * N]; list.edge = edge;
    seeded(seed);
    const double kept = exp(-0.5 * friction * dt);
    memset(waste, 0, sizeof(waste));
    list_pairs(x, &list);
    double start = liquid(x, f, &list) + chain(x, waste), heat = 0, end = 0, energy = 0;
    for (int k = 0; k < 3; k++) for (int i = BEADS; i < N; i++) start += 0.5 * v[k * N + i] * v[k * N + i];
    for (int step = 0; step < n_steps; step++) {
        if (friction > 0) heat += thermalise(v, BEADS, kept);
        for (int k = 0; k < 3; k++) for (int i = BEADS; i < N; i++) { v[k * N + i] += 0.5 * dt * f[k * N + i]; x[k * N + i] += dt * v[k * N + i]; }
        double along = h[step] * n_ways; int leg = (int)along; leg = leg >= n_ways ? n_ways - 1 : leg;
        const double *from = ways + leg * 3 * BEADS, *to = from + 3 * BEADS;
        for (int k = 0; k < 3; k++) for (int i = 0; i < BEADS; i++) x[k * N + i] = from[k * BEADS + i] + (to[k * BEADS + i] - from[k * BEADS + i]) * (along - leg);
        refresh(x, &list);
        energy = liquid(x, f, &list);
        for (int k = 0; k < 3; k++) for (int i = BEADS; i < N; i++) v[k * N + i] += 0.5 * dt * f[k * N + i];
        if (friction > 0) heat += thermalise(v, BEADS, kept);
    }
    end = energy + chain(x, waste);
    for (int k = 0; k < 3; k++) for (int i = BEADS; i < N; i++) end += 0.5 * v[k * N + i] * v[k * N + i];
    return end - start - heat;
}

/* Energy of an umbrella on the end-to-end distance, added to f. */
static double window(const double *x, double *f, double stiffness, double centre, double *r) {
    double d[3], u = 0;
    for (int k = 0; k < 3; k++) { d[k] = x[k * N] - x[k * N + BEADS - 1]; u += d[k] * d[k]; }
    *r = sqrt(u);
    for (int k = 0; k < 3; k++) { double g = stiffness * (*r - centre) * d[k] / *r; f[k * N] -= g; f[k * N + BEADS - 1] += g; }
    return 0.5 * stiffness * (*r - centre) * (*r - centre);
}

/* Generalised hybrid Monte Carlo in a window, in place: velocities kept in part, `length` steps of velocity Verlet, accepted or not, old
   positions and reversed velocities on rejection (Horowitz 1991). distances [n]; how many were accepted.
   KEPT_VELOCITY and UNTESTED leave out the reversal and the test: both are wrong, and the tests must see it. */
int hybrid(double *x, double *v, double edge, int n, int length, double dt, double kept, double stiffness, double centre, uint64_t seed, double *distances) {
    static List list; double f[3 * N], at[3 * N], was[3 * N], pull[3 * N], r, moved; list.edge = edge;
    int accepted = 0;
    seeded(seed);
    list_pairs(x, &list);
    double u = liquid(x, f, &list); u += chain(x, f); u += window(x, f, stiffness, centre, &r);
    for (int t = 0; t < n; t++) {
        thermalise(v, 0, kept);
        memcpy(at, x, sizeof(at)); memcpy(was, v, sizeof(was)); memcpy(pull, f, sizeof(pull));
        double rise = -u, e = u;
        for (int i = 0; i < 3 * N; i++) rise -= 0.5 * v[i] * v[i];
        for (int step = 0; step < length; step++) {
            for (int i = 0; i < 3 * N; i++) { v[i] += 0.5 * dt * f[i]; x[i] += dt * v[i]; }
            refresh(x, &list);
            e = liquid(x, f, &list); e += chain(x, f); e += window(x, f, stiffness, centre, &moved);
            for (int i = 0; i < 3 * N; i++) v[i] += 0.5 * dt * f[i];
        }
        rise += e;
        for (int i = 0; i < 3 * N; i++) rise += 0.5 * v[i] * v[i];
#ifdef UNTESTED
        rise = 0;
#endif
        if (log(uniform()) < -rise / KT) { u = e; r = moved; accepted++; }
        else {
            memcpy(x, at, sizeof(at)); memcpy(f, pull, sizeof(pull));
#ifdef KEPT_VELOCITY
            memcpy(v, was, sizeof(was));
#else
            for (int i = 0; i < 3 * N; i++) v[i] = -was[i];
#endif
        }
        distances[t] = r;
    }
    return accepted;
}
