// The one client of ws, undici and Chromium: they share the WebSocket API, so one set of operations serves all three.
// Operations answer with plain data. Waiting is bounded by the caller, who also compares what was seen with what ought
// to be. Runs in Node and, evaluated as a script, in a page; hence no imports and no exports.
globalThis.socketOperations = function (WebSocket) {
    const sockets = new Map();

    const describe = (data) => {
        if (typeof data === 'string') return { kind: 'text', size: data.length, text: data.slice(0, 1024) };
        return { kind: 'binary', size: data.byteLength };
    };

    // Noise, so that a frame stays large on the wire when it is compressed.
    const noise = (size) => {
        const bytes = new Uint8Array(size);
        let state = 12345;
        for (let i = 0; i < size; i++) {
            state = (Math.imul(state, 1103515245) + 12345) >>> 0;
            bytes[i] = state >>> 16;
        }
        return bytes;
    };

    const same = (sent, received) => {
        if (typeof sent === 'string') return sent === received;
        if (typeof received === 'string' || sent.byteLength !== received.byteLength) return false;
        const bytes = new Uint8Array(received);
        return sent.every((byte, i) => byte === bytes[i]);
    };

    const receive = (socket) => {
        if (socket.messages.length > 0) return Promise.resolve(socket.messages.shift());
        if (socket.end) return Promise.reject(new Error(`closed: ${JSON.stringify(socket.end)}`));
        return new Promise((resolve, reject) => socket.receivers.push({ resolve, reject }));
    };

    return {
        sockets,

        open({ name, url, protocols }) {
            const socket = { messages: [], receivers: [], closers: [], end: null, errors: 0 };
            const websocket = new WebSocket(url, protocols ?? []);
            socket.websocket = websocket;
            websocket.binaryType = 'arraybuffer';
            sockets.set(name, socket);
            return new Promise((resolve, reject) => {
                websocket.addEventListener('open', () => {
                    resolve({ protocol: websocket.protocol, extensions: websocket.extensions });
                });
                websocket.addEventListener('message', (event) => {
                    if (socket.receivers.length > 0) socket.receivers.shift().resolve(event.data);
                    else socket.messages.push(event.data);
                });
                websocket.addEventListener('error', () => (socket.errors += 1));
                websocket.addEventListener('close', (event) => {
                    socket.end = {
                        code: event.code, reason: event.reason, clean: event.wasClean, errors: socket.errors,
                    };
                    const error = new Error(`closed: ${JSON.stringify(socket.end)}`);
                    reject(error);
                    socket.receivers.splice(0).forEach((receiver) => receiver.reject(error));
                    socket.closers.splice(0).forEach((closer) => closer(socket.end));
                });
            });
        },

        send({ name, text }) {
            sockets.get(name).websocket.send(text);
            return null;
        },

        async receive({ name }) {
            return describe(await receive(sockets.get(name)));
        },

        // Sends text (repeated) or `bytes` bytes of noise, and compares the next message with it.
        async echo({ name, text, repeat, bytes }) {
            const socket = sockets.get(name);
            const sent = bytes === undefined ? text.repeat(repeat ?? 1) : noise(bytes);
            socket.websocket.send(sent);
            const received = await receive(socket);
            return { ...describe(received), same: same(sent, received) };
        },

        // Sends `count` numbered messages at once; the answer is how many came back, in order.
        async burst({ name, count }) {
            const socket = sockets.get(name);
            for (let i = 0; i < count; i++) socket.websocket.send(`message ${i}`);
            for (let i = 0; i < count; i++) if ((await receive(socket)) !== `message ${i}`) return i;
            return count;
        },

        close({ name, code, reason }) {
            sockets.get(name).websocket.close(code, reason);
            return null;
        },

        closed({ name }) {
            const socket = sockets.get(name);
            if (socket.end) return socket.end;
            return new Promise((resolve) => socket.closers.push(resolve));
        },
    };
};
