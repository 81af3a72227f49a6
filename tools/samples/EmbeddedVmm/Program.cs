using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;
using Vmm.Migration;
using Vmm.Migration.Status;

return args is ["update", ..]
    ? await Vmm.Samples.EmbeddedVmm.UpdateSample.RunAsync(args, Console.Out)
    : await Vmm.Samples.EmbeddedVmm.Sample.RunAsync(Console.Out);

namespace Vmm.Samples.EmbeddedVmm
{
    /// <summary>A whole VMM: a device of its own and two VMs in one process; one migrates to the other through memory.</summary>
    public static class Sample
    {
        public static async Task<int> RunAsync(TextWriter output)
        {
            var services = new ServiceCollection();
            services.AddVmm().AddMigration().AddDevice<CounterFactory>();
            await using ServiceProvider host = services.BuildServiceProvider();
            VmFactory factory = host.GetRequiredService<VmFactory>();
            var options = new VmOptions { Memory = [new RamBlockOptions { Name = "ram", SizeBytes = 4 << 20 }], Devices = [new DeviceOptions("counter")] };

            using Vm source = factory.Create(options);
            using Vm destination = factory.Create(options with { IsIncoming = true });
            source.Memory.Write(new GuestAddress(0x1000), "hello"u8);
            source.Devices.OfType<Counter>().Single().Increment(41);
            source.Cont();

            (InMemoryChannel here, InMemoryChannel there) = InMemoryChannel.CreatePair();
            source.Migration().SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
            Task<MigrationStatus> incoming = destination.Migration().MigrateIncoming(there);
            MigrationStatus sent = await source.Migration().Migrate(here);
            await incoming;

            byte[] text = new byte[5];
            destination.Memory.Read(new GuestAddress(0x1000), text);
            ulong count = destination.Devices.OfType<Counter>().Single().Increment(1);
            await output.WriteLineAsync($"{sent.ToWireName()}: source {source.RunState.State}, destination {destination.RunState.State}, "
                + $"memory '{System.Text.Encoding.ASCII.GetString(text)}', counter {count}");
            return sent == MigrationStatus.Completed && count == 42 ? 0 : 1;
        }
    }

    public sealed class Counter : IVmDevice
    {
        private static readonly VmStateDescription<Counter> s_description = new() { Name = "counter", Fields = [VmState.UInt64<Counter>("value", static c => ref c._value)] };
        private readonly IDisposable _registration;
        private ulong _value;

        public Counter(DeviceOptions options, IDeviceServices services) => (Id, _registration) = (options.Id, services.RegisterVmState(s_description, this));

        public string Id { get; }

        internal static IVmStateDescription Description => s_description;

        public ulong Increment(ulong by) => _value += by;

        public void Reset() => _value = 0;

        public void Dispose() => _registration.Dispose();
    }

    public sealed class CounterFactory : IDeviceFactory
    {
        public string TypeName => "counter";

        public string Summary => "a 64-bit counter";

        public IReadOnlyList<IVmStateDescription> Descriptions => [Counter.Description];

        public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new Counter(options, services);
    }
}
