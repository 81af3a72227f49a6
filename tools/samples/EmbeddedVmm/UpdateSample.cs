using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Migration;
using Vmm.Migration.Update;

namespace Vmm.Samples.EmbeddedVmm;

/// <summary>A VMM that moves its running VM into a new process. The same program runs on both sides.</summary>
public static class UpdateSample
{
    public static async Task<int> RunAsync(string[] arguments, TextWriter output)
    {
        var services = new ServiceCollection();
        services.AddVmm().AddMigration().AddDevice<CounterFactory>();
        await using ServiceProvider host = services.BuildServiceProvider();

        // Null in the first process; in the new process it receives the VM.
        using UpdateArrival? arrival = UpdateArrival.TakeFromEnvironment();
        using Vm vm = host.GetRequiredService<VmFactory>().Create(new VmOptions
        {
            Memory = [new RamBlockOptions { Name = "ram", SizeBytes = 4 << 20 }], Devices = [new DeviceOptions("counter")],
            IsIncoming = arrival is not null, Cpr = arrival?.Receive(),
        });
        if (arrival is null)
        {
            vm.Memory.Write(new GuestAddress(0x1000), "hello"u8);
            vm.Devices.OfType<Counter>().Single().Increment(41);
            vm.Cont();
            UpdateMethod method = arguments.Contains("exec") ? UpdateMethod.Exec : UpdateMethod.Transfer;
            UpdateResult result = await vm.Updater().UpdateAsync(new UpdateOptions { Arguments = arguments, Method = method });
            await output.WriteLineAsync($"old process: {vm.RunState.State}, new process is another: {result.Pid != Environment.ProcessId}");
            return 0;
        }

        await arrival.LoadAsync(vm);
        byte[] text = new byte[5];
        vm.Memory.Read(new GuestAddress(0x1000), text);
        await output.WriteLineAsync($"new process: {vm.RunState.State}, memory '{System.Text.Encoding.ASCII.GetString(text)}', counter {vm.Devices.OfType<Counter>().Single().Increment(1)}");
        return 0;
    }
}
