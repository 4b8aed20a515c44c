// Node 20 lacks it, and the packages use it while they load.
Promise.withResolvers ??= () => { const p = {}; p.promise = new Promise((a, b) => { p.resolve = a; p.reject = b }); return p }
