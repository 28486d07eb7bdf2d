// Portkey listens on all addresses and has no setting for that.
const net = require('node:net');
const { listen } = net.Server.prototype;
net.Server.prototype.listen = function (port, ...rest) {
  if (typeof port === 'object' && port !== null) {
    return listen.call(this, { ...port, host: '127.0.0.1' }, ...rest);
  }
  const callback = rest.find((argument) => typeof argument === 'function');
  return listen.call(this, port, '127.0.0.1', callback);
};
